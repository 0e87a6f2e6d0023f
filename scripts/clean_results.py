from auto_quantize_model.commands.clean_results import main

if __name__ == "__main__":
    raise SystemExit(main())
