from auto_quantize_model.commands.join_parts import main

if __name__ == "__main__":
    raise SystemExit(main())
