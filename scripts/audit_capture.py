from auto_quantize_model.commands.audit_capture import main

if __name__ == "__main__":
    raise SystemExit(main())
