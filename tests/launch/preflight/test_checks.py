"""What preflight looks at on one node: each thing found as it is, and what is wrong told with its remedy."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_server import free_port
from tiny_models import TinyModel

from moesaic.launch.cli import main
from moesaic.launch.config import ServerConfig
from moesaic.launch.gpus import Gpu
from moesaic.launch.models.checkpoint_files import inspect_checkpoint
from moesaic.launch.models.config import load_model_config
from moesaic.launch.preflight import libraries
from moesaic.launch.preflight.devices import check_gpus, check_nvshmem
from moesaic.launch.preflight.findings import Finding
from moesaic.launch.preflight.libraries import versions
from moesaic.launch.preflight.limits import Needs, check_cores, check_memlock, check_nofile, check_shm
from moesaic.launch.preflight.network import check_gpudirect, check_host_name, check_interface, check_interfaces, check_rdma
from moesaic.launch.preflight.ports import check_ports

Tiny = Callable[..., TinyModel]
LAPTOP = Needs(ranks_per_node=2, world_size=2, connections=512, cuda=False, rdma=False)
CLUSTER = Needs(ranks_per_node=8, world_size=32, connections=2048, cuda=True, rdma=True)
GIB = 1 << 30
INDEX = "model.safetensors.index.json"


def test_a_laptop_is_ready_for_the_demo_model_and_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model-path", "demo", "--device", "cpu", "--port", str(free_port())]

    assert main(["preflight", *flags]) == 0
    table = capsys.readouterr().out
    assert main(["preflight", "--json", *flags]) == 0
    answer = json.loads(capsys.readouterr().out)

    rows = {row["what"]: row for row in answer["findings"]}
    assert answer["ok"] and not any(row["status"] == "fail" for row in rows.values())
    assert rows["model files"]["found"].endswith("2 files, 12.5 MB, every tensor there")
    assert "the flags need none" in rows["GPUs"]["found"] and "GPUs" in table


def test_flags_that_need_a_gpu_fail_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--json", "--model-path", "demo", "--device", "cuda", "--port", str(free_port())]) == 1

    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["findings"]}
    failed = {what for what, row in rows.items() if row["status"] == "fail"}
    assert {"flags, layout and memory", "GPUs", "CUDA", "NCCL"} <= failed
    assert rows["GPUs"]["remedy"] == "run on a node with NVIDIA GPUs and their driver, or use --device cpu"


def test_a_command_line_that_cannot_be_read_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--model-path", "demo", "--tp-sizes", "2"]) == 2
    assert "moesaic preflight: unknown flag --tp-sizes: did you mean --tp-size?" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["plain", "fp8", "tied"])
def test_a_whole_checkpoint_has_no_problems(tiny: Tiny, variant: str) -> None:
    folder = tiny(variant).folder

    files = inspect_checkpoint(folder, load_model_config(folder))

    assert files.problems == () and files.num_files == 2
    assert files.num_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture
def broken(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    for file in tiny("fp8").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def problems_of(folder: Path) -> str:
    return "\n".join(inspect_checkpoint(folder, load_model_config(folder)).problems)


def test_a_download_that_was_cut_off_is_named_with_both_sizes(broken: Path) -> None:
    file = sorted(broken.glob("*.safetensors"))[1]
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])

    assert f"{file}: {whole - 100:,} bytes where its header promises {whole:,}" in problems_of(broken)


@pytest.mark.parametrize(
    "tensor", ["model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.0.self_attn.o_proj.weight_scale_inv"]
)
def test_a_missing_tensor_or_scale_is_named(broken: Path, tensor: str) -> None:
    index = json.loads((broken / INDEX).read_text())
    del index["weight_map"][tensor]
    (broken / INDEX).write_text(json.dumps(index))

    assert problems_of(broken) == f"{broken}: tensor {tensor} is in none of its files"


def test_a_missing_shard_a_wrong_shape_and_an_empty_folder_are_named(
    broken: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 320}))
    assert "gate_proj.weight has shape [160, 192], the config asks for [320, 192]" in problems_of(broken)

    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.unlink()
    assert str(shard) in problems_of(broken)

    (broken / INDEX).unlink()
    for file in broken.glob("*.safetensors"):
        file.unlink()
    assert "holds no safetensors; for random weights use --load-format dummy" in problems_of(broken)


def status(finding: Finding) -> str:
    return finding.status


def test_limits_that_only_a_cluster_minds(tmp_path: Path) -> None:
    missing = tmp_path / "shm"

    assert status(check_shm(LAPTOP, missing)) == "ok" and status(check_shm(CLUSTER, missing)) == "fail"
    assert status(check_memlock(LAPTOP, 64 << 10)) == "ok"
    assert status(check_memlock(CLUSTER, resource.RLIM_INFINITY)) == "ok"
    refused = check_memlock(CLUSTER, 64 << 20)
    assert refused.status == "fail" and "--ulimit memlock=-1" in refused.remedy


@pytest.mark.parametrize(("limit", "wanted"), [(1024, "ok"), (400, "warn"), (100, "fail"), (resource.RLIM_INFINITY, "ok")])
def test_open_files_are_counted_for_ranks_and_clients(limit: int, wanted: str) -> None:
    finding = check_nofile(LAPTOP, limit)

    assert finding.status == wanted
    assert wanted == "ok" or "ulimit -n 65536" in finding.remedy


def test_fewer_cores_than_ranks_are_a_warning() -> None:
    assert [status(check_cores(CLUSTER, cores)) for cores in (8, 7)] == ["ok", "warn"]


def test_a_taken_port_is_named_with_its_flag() -> None:
    port = free_port(following=5)
    config = ServerConfig(model_path="m", port=free_port(), tp_size=2, nnodes=2, dist_init_addr=f"127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", port + 3)):
        (http, ranks) = check_ports(config)

    assert http.status == "ok"
    assert ranks.found == f"127.0.0.1:{port + 3}: Address already in use" and "--dist-init-addr" in ranks.remedy
    assert [finding.what for finding in check_ports(replace(config, node_rank=1))] == ["ports: HTTP"]
    assert all(finding.status == "ok" for finding in check_ports(config))


def gpu(index: int = 0, **changes: Any) -> Gpu:
    return replace(Gpu(index=index, name="NVIDIA H200", total=140 * GIB, free=139 * GIB, driver="570.1"), **changes)


@pytest.mark.parametrize(
    ("gpus", "needed", "wanted", "words"),
    [
        ((), False, "ok", "not on this machine; the flags need none"),
        ((), True, "fail", "not on this machine"),
        ((gpu(), gpu(1)), True, "ok", "2 x NVIDIA H200, 140 GiB, driver 570.1"),
        ((gpu(),), True, "fail", "for 2 ranks"),
        ((gpu(), gpu(1, free=40 * GIB)), True, "warn", "others hold 100 GiB of GPU 1"),
        ((gpu(), gpu(1, name="NVIDIA A100")), True, "warn", "NVIDIA A100 and NVIDIA H200"),
    ],
)
def test_gpus(gpus: tuple[Gpu, ...], needed: bool, wanted: str, words: str) -> None:
    finding = check_gpus(gpus, needed=needed, num_wanted=2)

    assert finding.status == wanted and words in finding.found


def test_nvshmem_is_that_of_the_package_unless_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVSHMEM_DIR", raising=False)
    monkeypatch.setattr(libraries, "NVSHMEM_PACKAGES", ("nvidia-nvshmem-cu99",))  # a machine with GPUs has the real ones
    assert status(check_nvshmem(needed=False)) == "ok", "another backend does not mind"
    missing = check_nvshmem(needed=True)
    assert missing.status == "warn" and "pip install nvidia-nvshmem-cu12" in missing.remedy

    package = tmp_path / "nvidia_nvshmem_cu99-3.4.5.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-nvshmem-cu99\nVersion: 3.4.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert check_nvshmem(needed=True) == Finding(status="ok", what="NVSHMEM", found="3.4.5")
    assert versions()["NVSHMEM version"] == "3.4.5"

    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    assert f"version unknown ({tmp_path}/include/non_abi/nvshmem_version.h: No such file" in check_nvshmem(needed=True).found
    (tmp_path / "include" / "non_abi").mkdir(parents=True)
    lines = (f"#define NVSHMEM_VENDOR_{part}_VERSION {number}" for part, number in (("MAJOR", 3), ("MINOR", 5), ("PATCH", 19)))
    (tmp_path / "include" / "non_abi" / "nvshmem_version.h").write_text("\n".join(lines))
    assert versions()["NVSHMEM version"] == "3.5.19"


def test_a_name_that_means_this_machine_alone_is_no_name_for_others() -> None:
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.5"}

    assert check_host_name("node5", "10.0.0.5", addresses, "").status == "ok"
    assert check_host_name("node5", "127.0.1.1", addresses, "eth0").status == "ok"
    for address in ("127.0.1.1", None):
        finding = check_host_name("node5", address, addresses, "")
        assert finding.status == "fail" and finding.remedy.startswith("export GLOO_SOCKET_IFNAME=eth0")


def test_an_interface_that_does_not_exist_is_named() -> None:
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.5"}

    assert check_interface("127.0.0.1:5000", addresses, {"NCCL_SOCKET_IFNAME": "=eth0"}).found == "lo (127.0.0.1)"
    finding = check_interface("127.0.0.1:5000", addresses, {"GLOO_SOCKET_IFNAME": "bond0"})
    assert finding.status == "fail" and "GLOO_SOCKET_IFNAME=bond0 is no interface here" in finding.found


def test_interfaces_are_told_with_address_and_speed(tmp_path: Path) -> None:
    for name, files in {
        "eth0": {"speed": "25000", "mtu": "9000", "carrier": "1"},
        "docker0": {"carrier": "0"},
        "br0": {"speed": "-1"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(f"{text}\n")

    finding = check_interfaces(tmp_path, {"lo": "127.0.0.1", "eth0": "10.0.0.5", "docker0": "172.17.0.1", "br0": "10.1.0.1"})

    assert finding.found == "br0 10.1.0.1 (MTU ?); eth0 10.0.0.5 (25 Gb/s, MTU 9000)"


@pytest.fixture
def infiniband(tmp_path: Path) -> Path:
    """/sys/class/infiniband of a node with a RoCE port and an InfiniBand port that is down."""
    gids = {"0": "fe80:0000:0000:0000:0ac0:ebff:fe11:2233", "1": "fe80:0000:0000:0000:0ac0:ebff:fe11:2233"}
    gids |= {
        "2": "0000:0000:0000:0000:0000:ffff:0a00:0005",
        "3": "0000:0000:0000:0000:0000:ffff:0a00:0005",
        "4": ":".join(["0000"] * 8),
    }
    kinds = {"0": "IB/RoCE v1", "1": "RoCE v2", "2": "IB/RoCE v1", "3": "RoCE v2"}
    port = tmp_path / "mlx5_0" / "ports" / "1"
    (port / "gids").mkdir(parents=True)
    (port / "gid_attrs" / "types").mkdir(parents=True)
    for name, text in {"state": "4: ACTIVE", "link_layer": "Ethernet", "rate": "400 Gb/sec (4X NDR)"}.items():
        (port / name).write_text(f"{text}\n")
    for index, gid in gids.items():
        (port / "gids" / index).write_text(f"{gid}\n")
    for index, kind in kinds.items():
        (port / "gid_attrs" / "types" / index).write_text(f"{kind}\n")
    down = tmp_path / "mlx5_1" / "ports" / "1"
    down.mkdir(parents=True)
    (down / "state").write_text("1: DOWN\n")
    return tmp_path


def test_rdma_ports_are_told_with_their_gids(infiniband: Path) -> None:
    (finding,) = check_rdma(infiniband, needed=True, environment={})

    assert finding.status == "ok"
    assert finding.found == "mlx5_0 port 1 Ethernet 400 Gb/sec (4X NDR), 4 GIDs (RoCE v2: 3)"


@pytest.mark.parametrize(
    ("environment", "wanted", "words"),
    [
        ({"NCCL_IB_HCA": "mlx5_0:1,mlx5_1", "NCCL_IB_GID_INDEX": "3"}, ["ok", "ok", "ok"], "mlx5_0:1,mlx5_1"),
        ({"NCCL_IB_HCA": "mlx5_7"}, ["ok", "fail"], "mlx5_7: no such device"),
        ({"NCCL_IB_GID_INDEX": "4"}, ["ok", "fail"], "4: mlx5_0 has no GID there"),
    ],
)
def test_what_nccl_is_told_of_rdma_must_exist(infiniband: Path, environment: dict[str, str], wanted: list[str], words: str) -> None:
    findings = list(check_rdma(infiniband, needed=True, environment=environment))

    assert [finding.status for finding in findings] == wanted
    assert words in findings[1].found
    if "4" in environment.values():
        assert "set NCCL_IB_GID_INDEX to 3" in findings[1].remedy


def test_a_machine_without_rdma_is_a_warning_only_where_gpus_talk_to_other_machines(tmp_path: Path) -> None:
    assert [finding.status for needed in (False, True) for finding in check_rdma(tmp_path, needed=needed, environment={})] == [
        "ok",
        "warn",
    ]


def test_the_driver_options_of_ibgda_are_read(tmp_path: Path) -> None:
    params = tmp_path / "params"
    params.write_text("EnableStreamMemOPs: 1\n" + 'RegistryDwords: "PeerMappingOverride=1;"\n')
    (tmp_path / "nvidia_peermem").mkdir()

    assert [finding.status for finding in check_gpudirect(tmp_path, params, deepep=True)] == ["ok", "ok"]
    params.write_text("EnableStreamMemOPs: 0\n")
    _, lacking = check_gpudirect(tmp_path, params, deepep=True)
    assert "lacks EnableStreamMemOPs: 1 and PeerMappingOverride=1" in lacking.found
