"""Options: JSON below, command line above, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.options import InferenceOptions
from model.config import UniterConfig
from optim.options import TrainOptions
from tests.processes import ROOT
from utils.errors import InputError
from utils.options import parse_options, read_json_as

CONFIGS = ROOT / "config"
NEEDED = {
    "train_txt_dbs": ["t"], "train_img_dbs": ["i"], "val_txt_db": "t", "val_img_db": "i", "output_dir": "o",
}  # fmt: skip
PUBLISHED = {
    "compressed_db", "checkpoint", "output_dir", "max_txt_len", "conf_th", "max_bb", "min_bb", "num_bb",
    "train_batch_size", "negative_size", "hard_neg_size", "inf_minibatch_size", "margin", "learning_rate",
    "valid_steps", "num_train_steps", "optim", "betas", "dropout", "weight_decay", "grad_norm", "warmup_steps", "seed",
    "full_val", "fp16", "n_workers", "pin_mem", "train_txt_dbs", "train_img_dbs", "val_txt_db", "val_img_db",
    "test_txt_db", "test_img_db", "model_config",
}  # fmt: skip


def write_json(folder: Path, values: object) -> str:
    path = folder / "run.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


@pytest.mark.parametrize("config_first", [True, False])
def test_command_line_wins_in_any_order(tmp_path: Path, config_first: bool) -> None:
    """Also in what it unsets, such as the regulariser; of two words for an option, the last counts."""
    unset = {"IAIS": "singular", "checkpoint": "c.pt", "effective_batch": 64}
    config = ["--config", write_json(tmp_path, NEEDED | {"seed": 7, "margin": 0.5, **unset})]
    words = ["--seed", "9", "--betas", "0.8", "0.9", "--no-full_val", "--no-checkpoint", "--no-effective_batch"]
    words += ["--IAIS", "cacr", "--no-IAIS", "--no-precision", "--precision", "bf16"]
    options = parse_options(TrainOptions, config + words if config_first else words + config, "")
    assert (options.seed, options.margin, options.betas, options.full_val) == (9, 0.5, (0.8, 0.9), False)
    assert (options.IAIS, options.checkpoint, options.effective_batch, options.precision) == (None, None, None, "bf16")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train-*.json")), ids=lambda path: path.stem)
def test_shipped_training_configs(path: Path) -> None:
    options = parse_options(TrainOptions, ["--config", str(path)], "")
    assert options.negative_size >= options.hard_neg_size
    architecture = CONFIGS / Path(options.model_config).name
    assert architecture.exists()
    if "8gpu" in path.stem:
        assert set(json.loads(path.read_text())) == PUBLISHED | {"effective_batch"}
        size = "large" if "large" in path.stem else "base"
        assert (options.checkpoint, architecture.stem) == (f"/pretrain/uniter-{size}.pt", f"uniter-{size}")
        slow = "coco-large" in path.stem
        assert (options.learning_rate, options.full_val) == ((3e-5, False) if slow else (5e-5, True))
        assert (options.negative_size, options.hard_neg_size, options.train_batch_size) == (399, 31, 8)
        assert [options.micro_steps(world_size) for world_size in (1, 2, 8, 64)] == [64, 32, 8, 1]
        assert len(options.train_txt_dbs) == (2 if "coco" in path.stem else 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("uniter-*.json")), ids=lambda path: path.stem)
def test_shipped_architectures(path: Path) -> None:
    assert UniterConfig.from_json(path).vocab_size == 28996


BROKEN = [
    ("{", "not JSON"),
    ("", "not JSON"),
    ('{"a": ' * 5000, "not JSON"),
    ("[1]", "contains a JSON list, expected a JSON object"),
]
MISTAKES = [
    ({"lerning_rate": 1e-4}, r"unknown key 'lerning_rate' \(did you mean 'learning_rate'\?\)"),
    ({"seed": "1"}, r'seed: "1" given, expected int'),
    ({"seed": True}, "seed: true given, expected int"),
    ({"seed": 1.5}, "seed: 1.5 given, expected int"),
    ({"betas": [0.9]}, r"betas: \[0.9\] given, expected tuple\[float, float\]"),
    ({"optim": "sgd"}, r'optim: "sgd" given, expected one of adam, adamax, adamw'),
    ({"precision": "fp"}, r"precision: \"fp\" given, expected one of auto, fp32, bf16, fp16 \(did you mean"),
    ({"hard_neg_size": 500}, "hard_neg_size is 500, expected at most negative_size 399"),
    ({"warmup_steps": 5000}, "warmup_steps is 5000, expected less than num_train_steps 5000"),
    ({"micro_steps_per_pass": 3}, "micro_steps_per_pass is 3, expected a divisor of 8 .micro-steps per update"),
    ({"train_img_dbs": ["a", "b"]}, "train_img_dbs names 2 databases, expected 1"),
    ({"margin": -1.0}, "margin is -1.0, expected at least 0"),
    ({"seed": 2**70}, "seed"),
    ({"grad_norm": 0.0}, "grad_norm is 0.0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"output_dir": ""}, "output_dir is missing"),
    ({"full_val": False, "inf_minibatch_size": 1}, "inf_minibatch_size is 1, expected at least 2"),
]
MISTAKES_IN_AN_ARCHITECTURE = [
    ({"hidden_sise": 8}, r"unknown key 'hidden_sise' \(did you mean 'hidden_size'\?\)"),
    ({"hidden_size": 10, "num_attention_heads": 3}, "hidden_size 10 is not a multiple"),
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
]


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [(TrainOptions, text, message) for text, message in BROKEN]
    + [(TrainOptions, NEEDED | values, message) for values, message in MISTAKES]
    + [(UniterConfig, values, message) for values, message in MISTAKES_IN_AN_ARCHITECTURE],
)
def test_mistakes_in_json(tmp_path: Path, cls: type, values: object, message: str) -> None:
    path = write_json(tmp_path, values)
    with pytest.raises(InputError, match=f"run.json.*{message}"):
        read_json_as(cls, path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "1"], r"unknown option --lerning_rate \(did you mean '--learning_rate'\?\)"),
        (["--learning", "1"], "unknown option --learning"),
        (["--seed", "x"], '--seed: "x" given, expected int'),
        (["--iais_layers", "one"], "--iais_layers"),
        (["--IAIS", "both"], "expected one of singular, distributed"),
        (["--seed"], "expected one argument"),
        (["--no-seed"], r"unknown option --no-seed \(did you mean '--seed'\?\)"),
        (["--config", "nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_options(TrainOptions, arguments, "")


def test_inference_inherits_from_a_training(tmp_path: Path) -> None:
    hps = write_json(tmp_path, {"conf_th": 0.3, "max_bb": 50, "seed": 3, "checkpoint": "other.pt"})
    words = ["--txt_db", "t", "--img_db", "i", "--checkpoint", "mine.pt", "--output_dir", "o", "--train_config", hps]
    keys = {"train_config": ("conf_th", "max_bb")}
    options = parse_options(InferenceOptions, [*words, "--max_bb", "20"], "", inherit=keys)
    assert (options.conf_th, options.max_bb, options.checkpoint, options.model_config) == (0.3, 20, "mine.pt", "")
    words += ["--model_config", "m.json", "--no-train_config"]
    assert parse_options(InferenceOptions, words, "", inherit=keys).conf_th == 0.2
