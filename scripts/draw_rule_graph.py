from auto_quantize_model.commands.draw_rule_graph import main

if __name__ == "__main__":
    raise SystemExit(main())
