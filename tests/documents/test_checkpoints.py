"""The page of checkpoints says what the configs say."""

import json

from documents import checkpoint_page


def test_the_page_is_fresh():
    text = checkpoint_page.render()
    assert checkpoint_page.PAGE.read_text(encoding="ascii") == text, "run python tests/documents/checkpoint_page.py"


def test_it_agrees_with_the_files():
    """Read without the plan, by the keys that these files have."""
    page = checkpoint_page.PAGE.read_text(encoding="ascii")
    for path in checkpoint_page.CONFIGS:
        config = json.loads(path.read_text())
        text = config.get("text_config", config)
        experts = text.get("num_experts") or text["num_local_experts"]
        numbers = f"{text['num_hidden_layers']} | {experts} | {text['num_experts_per_tok']}"
        assert f"| {path.parent.name} | `{config['model_type']}` | {numbers} |" in page
        assert config["_source"] in page
