from auto_quantize_model.commands.get_model import main

if __name__ == "__main__":
    raise SystemExit(main())
