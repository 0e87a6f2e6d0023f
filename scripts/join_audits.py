from auto_quantize_model.commands.join_audits import main

if __name__ == "__main__":
    raise SystemExit(main())
