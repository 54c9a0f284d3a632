"""The command line: SGLang's names, later capabilities refused, nothing ignored."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moesaic.launch.args import parse_serve
from moesaic.launch.cli import main
from moesaic.launch.config import ServerConfig
from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.errors import ConfigError
from moesaic.launch.flags import FLAG_GROUPS, LATER_FLAGS


def test_every_config_field_has_exactly_one_flag_and_its_default() -> None:
    named = [flag.field for flags in FLAG_GROUPS.values() for flag in flags]

    assert sorted(named) == sorted(ServerConfig.__dataclass_fields__)
    assert parse_serve(["--model-path", "m"]) == ServerConfig(model_path="m")


def test_the_command_of_the_readme() -> None:
    command = (
        "--model-path DIR --tp 16 --dp 16 --enable-dp-attention --moe-a2a-backend deepep --nnodes 2 --node-rank 0 "
        "--dist-init-addr HOST:5000"
    )

    assert parse_serve(command.split()) == ServerConfig(
        model_path="DIR",
        tp_size=16,
        dp_size=16,
        enable_dp_attention=True,
        moe_a2a_backend="deepep",
        nnodes=2,
        dist_init_addr="HOST:5000",
    )


@pytest.mark.parametrize("names", [("--tp", "--dp", "--ep"), ("--tp-size", "--data-parallel-size", "--ep-size")])
def test_aliases_mean_the_same(names: tuple[str, str, str]) -> None:
    tp, dp, ep = names

    config = parse_serve(["--model-path", "m", tp, "4", f"{dp}=2", ep, "4"])

    assert (config.tp_size, config.dp_size, config.ep_size) == (4, 2, 4)


def test_demo_is_the_checkpoint_that_comes_along() -> None:
    assert parse_serve(["--model-path", "demo"]).model_path == str(CHECKPOINT_DIR)


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--modelpath", "--model-path"), ("--tpsize", "--tp-size"), ("--enable-dp-atention", "--enable-dp-attention")],
)
def test_an_unknown_flag_gets_the_nearest_known_one(flag: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown flag {flag}: did you mean {hint}"):
        parse_serve(["--model-path", "m", flag, "2"])


def test_a_prefix_of_a_flag_is_not_that_flag() -> None:
    with pytest.raises(ConfigError, match="unknown flag --model-pat"):
        parse_serve(["--model-pat", "m"])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("--port 0", "1..65535"),
        ("--tp 0", "1 or more"),
        ("--tp two", "'two'"),
        ("--node-rank -1", "0 or more"),
        ("--mem-fraction-static 1.5", "fraction"),
        ("--tbo-token-distribution-threshold 0.51", "a share in 0..0.5"),
        ("--tbo-token-distribution-threshold nan", "a share in 0..0.5"),
        ("--chunked-prefill-size 0", "-1 for no chunking"),
        ("--dist-init-addr host", "HOST:PORT"),
        ("--dtype float16", "float16"),
        ("leftover", "leftover"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_legal(arguments: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_serve(["--model-path", "m", *arguments.split()])

    assert wanted in str(caught.value)


@pytest.mark.parametrize("flag", LATER_FLAGS, ids=lambda flag: flag.name)
def test_what_is_not_built_is_refused_unless_it_is_off(flag) -> None:  # type: ignore[no-untyped-def]
    on = [flag.name] if flag.off is None else [flag.name, "7"]

    with pytest.raises(ConfigError, match=rf"{flag.name}.*is not built yet"):
        parse_serve(["--model-path", "m", *on])
    for value in flag.off or ():
        parse_serve(["--model-path", "m", flag.name, value])


def test_everything_not_built_comes_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_serve(["--model-path", "m", "--enable-hierarchical-cache", "--pp-size", "2", "--deterministic"])

    assert len(str(caught.value).splitlines()) == 1 + 3


def test_help_lists_all_flags_in_groups() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moesaic.launch.cli", "serve", "--help"], capture_output=True, text=True, check=True
    )

    assert all(f"\n{title}:" in result.stdout for title in FLAG_GROUPS)
    assert all(flag.names[0] in result.stdout for flags in FLAG_GROUPS.values() for flag in flags)


def test_the_command_says_its_version_and_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moesaic ")
    assert main(["server"]) == 2
    assert "unknown command 'server'" in capsys.readouterr().err
    assert main(["serve"]) == 2
    assert (
        capsys.readouterr().err
        == "moesaic serve: --model-path is missing: a folder with a model, or `demo`, the small one that comes along\n"
    )
    assert main(["serve", "demo"]) == 2
    assert capsys.readouterr().err == "moesaic serve: unexpected argument: demo; did you mean --model-path demo?\n"
