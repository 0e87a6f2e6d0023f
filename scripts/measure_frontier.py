from auto_quantize_model.commands.measure_frontier import main

if __name__ == "__main__":
    raise SystemExit(main())
