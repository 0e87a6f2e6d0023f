from auto_quantize_model.commands.train_digits import main

if __name__ == "__main__":
    raise SystemExit(main())
