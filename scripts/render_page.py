from auto_quantize_model.commands.render_page import main

if __name__ == "__main__":
    raise SystemExit(main())
