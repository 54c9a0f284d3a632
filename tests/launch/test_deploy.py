"""The deployment files: what they start is what moesaic understands, fits DeepSeek-V3, and is the published layout."""

from __future__ import annotations

import argparse
import os
import re
import stat
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepseek_v3 import DEEPSEEK_V3

from moesaic.launch.args import parse_serve
from moesaic.launch.cli import main
from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import refuse
from moesaic.launch.deepep_rules import deepep_memory
from moesaic.launch.deploy_files import DEPLOY_DIR
from moesaic.launch.engine.memory import DeviceMemory
from moesaic.launch.expert_placement import placement_conflicts
from moesaic.launch.hardware import Hardware
from moesaic.launch.layout_rules import layout_conflicts
from moesaic.launch.memory_advice import refuse_memory
from moesaic.launch.memory_parts import MemoryInputs
from moesaic.launch.memory_plan import plan_memory
from moesaic.launch.model_rules import model_conflicts
from moesaic.launch.models.config import parse_model_config
from moesaic.launch.models.tensors import FP8_KINDS
from moesaic.launch.resolution import resolve
from moesaic.launch.router_cli import router_command
from moesaic.launch.startup import model_shape
from moesaic.launch.topology import Topology

H200 = DeviceMemory(total=141 * 10**9, free=141 * 10**9)
MODEL = parse_model_config(DEEPSEEK_V3)


def check_served(configs: list[ServerConfig]) -> None:
    """Every node of one instance: legal alone, alike but for its number, and within a GPU's memory."""
    assert [config.node_rank for config in configs] == list(range(configs[0].nnodes))
    assert {replace(config, node_rank=0) for config in configs} == {configs[0]}
    config, shape = configs[0], model_shape(MODEL)
    assert config.moe_a2a_backend == "deepep" and config.tp_size == 8 * config.nnodes
    refuse([*layout_conflicts(config), *model_conflicts(config, shape)])
    refuse(placement_conflicts(config, shape, Topology.from_config(config)))
    # The role itself needs nixl: what it means for dispatch is said in its place.
    alone = replace(config, disaggregation_transfer_backend="auto", disaggregation_mode="null", disaggregation_bootstrap_port=8998)
    if config.disaggregation_mode == "prefill":
        alone = replace(alone, deepep_mode="normal")
    if config.disaggregation_mode == "decode":
        alone = replace(alone, deepep_mode="low_latency", chunked_prefill_size=16 * config.dp_size)
    resolution = resolve(alone, shape, Hardware(num_cores=64, num_cuda_devices=8, deepep_missing=None))
    assert resolution.config.moe_a2a_backend == "deepep" and resolution.config.fp8_weights
    inputs = MemoryInputs(
        model=MODEL,
        topology=resolution.topology,
        config=resolution.config,
        num_slots=MODEL.n_routed_experts + config.ep_num_redundant_experts,
        experts_move=config.enable_eplb,
        graph_batch_sizes=resolution.config.cuda_graph_rows,
        fp8=FP8_KINDS,
        communication=partial(deepep_memory, MODEL, MODEL.n_routed_experts + config.ep_num_redundant_experts),
    )
    refuse_memory(inputs, plan_memory(inputs, H200))


def kubernetes_arguments(pod: dict[str, Any], container: str, size: int, node: int) -> tuple[list[str], list[str]]:
    """(command, arguments) of a container on one node, with what LeaderWorkerSet puts into its environment."""
    environment = {"LWS_GROUP_SIZE": str(size), "LWS_WORKER_INDEX": str(node), "LWS_LEADER_ADDRESS": "moesaic-0.moesaic.default"}
    (found,) = [each for each in (*pod.get("initContainers", []), *pod["containers"]) if each["name"] == container]
    return found["command"], [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in found["args"]]


@pytest.mark.parametrize(
    ("file", "instances"),
    [
        ("unified.yaml", {"moesaic": ("null", 2, 16)}),
        ("pd.yaml", {"moesaic-prefill": ("prefill", 4, 32), "moesaic-decode": ("decode", 9, 72)}),
    ],
)
def test_the_manifests_start_servers_that_moesaic_understands(file: str, instances: dict[str, tuple[str, int, int]]) -> None:
    documents = list(yaml.safe_load_all((DEPLOY_DIR / file).read_text(encoding="utf-8")))
    sets = {document["metadata"]["name"]: document for document in documents if document["kind"] == "LeaderWorkerSet"}

    assert sets.keys() == instances.keys()
    for name, (role, nodes, world_size) in instances.items():
        template = sets[name]["spec"]["leaderWorkerTemplate"]
        pod = template["workerTemplate"]["spec"]
        assert template["size"] == nodes and pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
        configs = []
        for node in range(nodes):
            looked, looked_at = kubernetes_arguments(pod, "preflight", nodes, node)
            served, flags = kubernetes_arguments(pod, "serve", nodes, node)
            assert (looked, served) == (["moesaic", "preflight"], ["moesaic", "serve"]) and looked_at == flags
            configs.append(parse_serve(flags))
        assert (configs[0].disaggregation_mode, configs[0].tp_size, configs[0].dp_size) == (role, world_size, world_size)
        check_served(configs)
        assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/models", "/dev/shm"}


def test_the_router_of_the_manifests_knows_both_leaders() -> None:
    documents = list(yaml.safe_load_all((DEPLOY_DIR / "pd.yaml").read_text(encoding="utf-8")))
    (router,) = [document for document in documents if document["kind"] == "Deployment"]
    command, arguments = kubernetes_arguments(router["spec"]["template"]["spec"], "router", 1, 0)

    assert command == ["moesaic", "router"] and arguments == check_router(arguments)
    assert {"http://moesaic-prefill-0.moesaic-prefill:30000", "http://moesaic-decode-0.moesaic-decode:30000"} < set(arguments)


def check_router(arguments: list[str]) -> list[str]:
    """The router's own parser takes them."""
    from sglang_router.router_args import RouterArgs

    command = router_command(arguments)
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    parsed = parser.parse_args(command[3:])
    assert parsed.pd_disaggregation and parsed.prefill and parsed.decode
    return arguments


STANDINS = {
    # Which machines there are.
    "scontrol": 'for number in $(seq -w 1 "$SLURM_JOB_NUM_NODES"); do echo "node$number"; done',
    # Runs a step's command once for each of its tasks, one after the other.
    "srun": """
tasks="$SLURM_JOB_NUM_NODES"
while [[ "$1" == --* ]]; do case "$1" in --ntasks=*) tasks="${1#*=}";; esac; shift; done
for ((task = 0; task < tasks; task++)); do SLURM_PROCID="$task" "$@"; done
""",
    # Notes how it was called: one file per call, one word a line.
    "moesaic": 'printf "%s\\n" "$@" >"$(mktemp "$NOTES/call.XXXXXX")"',
}


def slurm_calls(script: str, num_nodes: int, folder: Path) -> list[list[str]]:
    """What the script calls moesaic with, on all nodes, in the order of the calls of each kind."""
    bin_folder, notes = folder / "bin", folder / "notes"
    bin_folder.mkdir()
    notes.mkdir()
    for name, body in STANDINS.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(stat.S_IRWXU)
    environment = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "NOTES": str(notes),
        "MODEL": "/models/DeepSeek-V3",
        "DEPLOY_DIR": str(DEPLOY_DIR),
        "SLURM_JOB_NUM_NODES": str(num_nodes),
        "SLURM_JOB_NODELIST": "node[01-13]",
    }
    done = subprocess.run(
        ["bash", str(DEPLOY_DIR / script)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [path.read_text().splitlines() for path in notes.iterdir()]


@pytest.mark.parametrize(
    ("script", "num_nodes", "instances"),
    [
        ("unified.slurm", 2, {"null": (2, "node1:5000")}),
        ("pd.slurm", 13, {"prefill": (4, "node01:5000"), "decode": (9, "node05:5000")}),
    ],
)
def test_the_slurm_scripts_start_servers_that_moesaic_understands(
    tmp_path: Path, script: str, num_nodes: int, instances: dict[str, tuple[int, str]]
) -> None:
    calls = slurm_calls(script, num_nodes, tmp_path)

    served = sorted((parse_serve(rest) for name, *rest in calls if name == "serve"), key=lambda config: config.node_rank)
    looked = [parse_serve(rest) for name, *rest in calls if name == "preflight"]
    assert set(served) == set(looked) and len(served) == len(looked) == num_nodes
    for role, (nodes, address) in instances.items():
        configs = [config for config in served if config.disaggregation_mode == role]
        assert (configs[0].nnodes, configs[0].dist_init_addr) == (nodes, address)
        check_served(configs)
    routers = [rest for name, *rest in calls if name == "router"]
    assert len(routers) == (script == "pd.slurm")
    for arguments in routers:
        check_router(arguments)


def test_slurm_and_kubernetes_start_the_same(tmp_path: Path) -> None:
    calls = slurm_calls("pd.slurm", 13, tmp_path)
    by_slurm = {parse_serve(rest) for name, *rest in calls if name == "serve"}
    documents = list(yaml.safe_load_all((DEPLOY_DIR / "pd.yaml").read_text(encoding="utf-8")))
    by_kubernetes = set()
    for document in documents:
        if document["kind"] == "LeaderWorkerSet":
            template = document["spec"]["leaderWorkerTemplate"]
            for node in range(template["size"]):
                _, flags = kubernetes_arguments(template["workerTemplate"]["spec"], "serve", template["size"], node)
                by_kubernetes.add(parse_serve(flags))

    assert {replace(config, dist_init_addr=None) for config in by_slurm} == {
        replace(config, dist_init_addr=None) for config in by_kubernetes
    }


@pytest.mark.parametrize("file", ["unified.slurm", "pd.slurm", "environment.sh"])
def test_the_scripts_are_sound_bash(file: str) -> None:
    assert subprocess.run(["bash", "-n", str(DEPLOY_DIR / file)], capture_output=True, timeout=20, check=False).stderr == b""


def test_deploy_files_are_copied_and_never_over_adapted_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "cluster"

    assert main(["deploy-files", str(target)]) == 0
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {
        file.name: file.read_bytes() for file in DEPLOY_DIR.iterdir()
    }
    assert main(["deploy-files", str(target)]) == 2
    assert "holds README.md, environment.sh" in capsys.readouterr().err
