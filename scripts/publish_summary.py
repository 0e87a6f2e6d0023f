from auto_quantize_model.commands.publish_summary import main

if __name__ == "__main__":
    raise SystemExit(main())
