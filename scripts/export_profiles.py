from auto_quantize_model.commands.export_profiles import main

if __name__ == "__main__":
    raise SystemExit(main())
