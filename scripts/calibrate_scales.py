from auto_quantize_model.commands.calibrate_scales import main

if __name__ == "__main__":
    raise SystemExit(main())
