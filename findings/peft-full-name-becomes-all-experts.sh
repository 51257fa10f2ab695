#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: the full name of one dense module becomes an adapter on the experts of another
# layer. Nothing is said.
#
# PEFT reads target names as those of transformers 4, where experts were Linear modules, and turns `gate_proj`,
# `up_proj` and `down_proj` of a mixture into the stacked parameters of its experts. A full path, or a regular expression
# that only the dense MLP of layer 0 matches, is turned too: `target_modules` is emptied, `target_parameters` names all
# experts. What was asked for gets no adapter, and all experts of the other layer get one. Expected of a path was the
# module of that path.
#
# Seen (2026-12-01, Python 3.11), a Qwen 3 mixture of two layers, the first of them dense:
#   names:       target_modules [], target_parameters ['down_proj', 'gate_up_proj'], adapted: layers [1]
#   full paths:  target_modules [], target_parameters ['down_proj', 'gate_up_proj'], adapted: layers [1]
#   expression:  target_modules [], target_parameters ['down_proj', 'gate_up_proj'], adapted: layers [1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.23.0 peft==0.21.2
cat > "$folder/adapt.py" <<'PY'
import re

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

LEAVES = ("gate_proj", "up_proj", "down_proj")
ASKED = {
    "names": list(LEAVES),
    "full paths": [f"model.layers.0.mlp.{leaf}" for leaf in LEAVES],
    "expression": r"model\.layers\.0\.mlp\.(gate_proj|up_proj|down_proj)",
}
for what, asked in ASKED.items():
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        mlp_only_layers=[0],
    )
    plain = AutoModelForCausalLM.from_config(config)
    dense = [name for name, _ in plain.named_modules() if re.fullmatch(ASKED["expression"], name)]
    assert dense == ASKED["full paths"], dense
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=asked))
    said = model.peft_config["default"]
    learns = [name for name, weight in model.named_parameters() if weight.requires_grad]
    layers = sorted({int(re.search(r"layers\.(\d+)\.", name)[1]) for name in learns})
    modules, parameters = sorted(said.target_modules), sorted(said.target_parameters)
    print(f"{what + ':':12} target_modules {modules}, target_parameters {parameters}, adapted: layers {layers}")
    assert (modules, parameters, layers) == ([], ["down_proj", "gate_up_proj"], [1])
    assert all(".experts." in name for name in learns), learns
PY
"$folder/venv/bin/python" -W ignore "$folder/adapt.py"
echo "as described"
