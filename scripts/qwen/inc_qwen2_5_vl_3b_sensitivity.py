from auto_quantize_model.commands.inc_qwen2_5_vl_3b_sensitivity import main

if __name__ == "__main__":
    raise SystemExit(main())
