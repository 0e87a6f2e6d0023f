from auto_quantize_model.commands.measure_heldout import main

if __name__ == "__main__":
    raise SystemExit(main())
