# What NCCL, NVSHMEM (DeepEP) and gloo have to know of a cluster. Sourced by the Slurm scripts; the Kubernetes manifests carry the
# same names as `env`. Everything here is a guess for 8 GPUs with 8 NICs per node: `moesaic preflight` shows what a node really has.
# Not run on hardware.

# --- which interface carries the small talk (rendezvous, gloo's step headers, NCCL's bootstrap) ---------------------------------
# gloo otherwise uses the address that this host's name has, which is 127.0.1.1 on many Debian machines.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-eth0}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-eth0}"

# --- which NICs carry the tokens -------------------------------------------------------------------------------------------------
# Only the compute fabric: a storage or management NIC in this list slows every collective. `preflight` lists the active ports.
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"
# RoCE only: the index of the RoCE v2 GID with an IPv4 address ("RoCE v2: 3" in preflight's row). On InfiniBand leave it out.
# export NCCL_IB_GID_INDEX=3
# RoCE only: the traffic class of the lossless queue, as the switches have it.
# export NCCL_IB_TC=106

# --- NVSHMEM, under DeepEP -------------------------------------------------------------------------------------------------------
# GPUs drive the NICs themselves (IBGDA). Needs the driver options that preflight's row "IBGDA" checks.
export NVSHMEM_IB_ENABLE_IBGDA=1
# The same NICs as NCCL; a GID index of its own on RoCE.
export NVSHMEM_HCA_PREFIX="${NVSHMEM_HCA_PREFIX:-mlx5}"
# export NVSHMEM_IB_GID_INDEX=3
export NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME="${NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME:-$GLOO_SOCKET_IFNAME}"
# Entries of a queue: at least 2 x (--deepep-max-dispatch-tokens-per-rank + 1).
export NVSHMEM_QP_DEPTH="${NVSHMEM_QP_DEPTH:-1024}"

# --- limits: RDMA pins its buffers, and every rank has a socket to each other one --------------------------------------------------
ulimit -l unlimited || echo "memlock is limited: see 'locked memory' in moesaic preflight" >&2
ulimit -n 65536 || echo "open files are limited: see 'open files' in moesaic preflight" >&2
