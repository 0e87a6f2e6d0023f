from auto_quantize_model.commands.plan_quantization import main

if __name__ == "__main__":
    raise SystemExit(main())
