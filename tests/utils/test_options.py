"""Options: JSON below, command line above, and a line for every mistake."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from evaluation.options import InferenceOptions
from model.config import UniterConfig
from optim.options import TrainOptions
from utils.errors import InputError
from utils.options import parse_options, read_json_as

CONFIGS = Path(__file__).parent.parent.parent / "config"
NEEDED = {
    "train_txt_dbs": ["t"], "train_img_dbs": ["i"], "val_txt_db": "t", "val_img_db": "i", "output_dir": "o",
}  # fmt: skip
PUBLISHED = [
    "compressed_db", "checkpoint", "output_dir", "max_txt_len", "conf_th", "max_bb", "min_bb", "num_bb",
    "train_batch_size", "negative_size", "hard_neg_size", "inf_minibatch_size", "margin", "learning_rate",
    "valid_steps", "num_train_steps", "optim", "betas", "dropout", "weight_decay", "grad_norm", "warmup_steps", "seed",
    "full_val", "fp16", "n_workers", "pin_mem", "train_txt_dbs", "train_img_dbs", "val_txt_db", "val_img_db",
    "test_txt_db", "test_img_db", "model_config",
]  # fmt: skip


def written(folder: Path, **values: object) -> str:
    path = folder / "run.json"
    path.write_text(json.dumps(NEEDED | values))
    return str(path)


def test_every_published_name_is_an_option() -> None:
    assert set(PUBLISHED) <= {field.name for field in fields(TrainOptions)}


@pytest.mark.parametrize("first", ["config", "option"])
def test_command_line_wins_in_any_order(tmp_path: Path, first: str) -> None:
    config = ["--config", written(tmp_path, seed=7, margin=0.5)]
    option = ["--seed", "9", "--betas", "0.8", "0.9", "--no-full_val"]
    options = parse_options(TrainOptions, config + option if first == "config" else option + config, "")
    assert (options.seed, options.margin, options.betas, options.full_val) == (9, 0.5, (0.8, 0.9), False)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train-*.json")), ids=lambda path: path.stem)
def test_shipped_training_configs(path: Path) -> None:
    options = parse_options(TrainOptions, ["--config", str(path)], "")
    assert "8gpu" not in path.stem or set(json.loads(path.read_text())) == {*PUBLISHED, "effective_batch"}
    assert options.negative_size >= options.hard_neg_size
    architecture = CONFIGS / Path(options.model_config).name
    assert architecture.exists()
    if "8gpu" in path.stem:
        size = "large" if "large" in path.stem else "base"
        assert options.checkpoint == f"/pretrain/uniter-{size}.pt"
        assert architecture.stem == f"uniter-{size}"
        slow = "coco-large" in path.stem
        assert (options.learning_rate, options.full_val) == ((3e-5, False) if slow else (5e-5, True))
        assert (options.negative_size, options.hard_neg_size, options.train_batch_size) == (399, 31, 8)
        assert [options.micro_steps(workers) for workers in (1, 2, 8, 64)] == [64, 32, 8, 1]
        assert len(options.train_txt_dbs) == (2 if "coco" in path.stem else 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("uniter-*.json")), ids=lambda path: path.stem)
def test_shipped_architectures(path: Path) -> None:
    assert UniterConfig.from_json(path).vocab_size == 28996


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1e-4}, r"unknown key 'lerning_rate' \(did you mean 'learning_rate'\?\)"),
        ({"seed": "1"}, r'seed: "1" given, expected int'),
        ({"seed": True}, "seed: true given, expected int"),
        ({"seed": 1.5}, "seed: 1.5 given, expected int"),
        ({"betas": [0.9]}, r"betas: \[0.9\] given, expected tuple\[float, float\]"),
        ({"optim": "sgd"}, r'optim: "sgd" given, expected one of adam, adamax, adamw'),
        ({"hard_neg_size": 500}, "hard_neg_size is 500, expected at most negative_size 399"),
        ({"warmup_steps": 5000}, "warmup_steps is 5000, expected fewer than num_train_steps 5000"),
        ({"micro_steps_per_pass": 3}, "micro_steps_per_pass is 3, expected a divisor of an update's 8 micro-steps"),
        ({"train_img_dbs": ["a", "b"]}, "train_img_dbs names 2 databases, expected 1"),
        ({"margin": -1.0}, "margin is -1.0, expected at least 0"),
        ({"seed": 2**70}, "seed"),
        ({"grad_norm": 0.0}, "grad_norm is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"output_dir": ""}, "output_dir is missing"),
        ({"full_val": False, "inf_minibatch_size": 1}, "inf_minibatch_size is 1, expected at least 2"),
    ],
)
def test_mistakes_in_json(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_options(TrainOptions, ["--config", written(tmp_path, **values)], "")
    assert "run.json" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--lerning_rate", "1"],
            r"unknown option --lerning_rate \(did you mean '--learning_rate'\?\)",
        ),
        (["--learning", "1"], "unknown option --learning"),
        (["--seed", "x"], '--seed: "x" given, expected int'),
        (["--iais_layers", "one"], "--iais_layers"),
        (["--IAIS", "both"], "expected one of singular, distributed"),
        (["--seed"], "expected one argument"),
        (["--config", "nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_options(TrainOptions, arguments, "")


@pytest.mark.parametrize("text", ["{", "[1]", "", '{"a": ' * 5000])
def test_broken_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(InputError, match="broken"):
        parse_options(TrainOptions, ["--config", str(path)], "")


def test_inference_inherits_from_a_training(tmp_path: Path) -> None:
    hps = tmp_path / "hps.json"
    hps.write_text(json.dumps({"conf_th": 0.3, "max_bb": 50, "seed": 3, "checkpoint": "other.pt"}))
    arguments = ["--txt_db", "t", "--img_db", "i", "--checkpoint", "mine.pt", "--output_dir", "o", "--train_config", str(hps)]
    keys = {"train_config": ("conf_th", "max_bb")}
    options = parse_options(InferenceOptions, [*arguments, "--max_bb", "20"], "", inherit=keys)
    assert (options.conf_th, options.max_bb, options.checkpoint, options.model_config) == (0.3, 20, "mine.pt", "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_sise": 8}, r"unknown key 'hidden_sise' \(did you mean 'hidden_size'\?\)"),
        ({"hidden_size": 10, "num_attention_heads": 3}, "hidden_size 10 is not a multiple"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
    ],
)
def test_mistakes_in_an_architecture(tmp_path: Path, values: dict[str, object], message: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as caught:
        read_json_as(UniterConfig, path)
    assert str(path) in str(caught.value)
