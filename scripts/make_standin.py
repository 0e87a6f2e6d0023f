from auto_quantize_model.commands.make_standin import main

if __name__ == "__main__":
    raise SystemExit(main())
