from auto_quantize_model.commands.build_profiles import main

if __name__ == "__main__":
    raise SystemExit(main())
