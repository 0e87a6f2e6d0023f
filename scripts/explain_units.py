from auto_quantize_model.commands.explain_units import main

if __name__ == "__main__":
    raise SystemExit(main())
