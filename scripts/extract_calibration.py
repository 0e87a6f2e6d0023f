from auto_quantize_model.commands.extract_calibration import main

if __name__ == "__main__":
    raise SystemExit(main())
