from auto_quantize_model.commands.write_config import main

if __name__ == "__main__":
    raise SystemExit(main())
