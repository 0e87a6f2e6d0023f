from auto_quantize_model.commands.compare_sensitivity import main

if __name__ == "__main__":
    raise SystemExit(main())
