# shellcheck shell=bash
# Settings of every rank, sourced by deepspeed.sh and slurm/pretrain.sbatch. Edit for your cluster.
# A value that is already set in your environment wins.

# A line reaches the log when it is said, not when a buffer is full or lost with the process.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# A crash inside compiled code prints the Python stack it came from.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# Threads of a rank. Unset: under SLURM the task's cores (--cpus-per-task), else the host's cores divided by its
# ranks. Set it when ranks shall not use all of their cores.
# export OMP_NUM_THREADS=8

# CPU runs short of memory: freed tensors go back to the system, a fifth less at the peak, a fifth more time.
# export MALLOC_MMAP_THRESHOLD_=1048576

# The network interface between hosts, when a host has several and the first is not the fast one; a wrong choice
# hangs or crawls. gloo (CPU) and NCCL (GPU) each have their own.
# export GLOO_SOCKET_IFNAME=eth0
# export NCCL_SOCKET_IFNAME=ib0

# What NCCL chose (interfaces, rings), printed once at start-up; the first thing to look at when links are slow.
# export NCCL_DEBUG=INFO

# "cpu" trains on the CPU of a host that has a GPU.
# export DS_ACCELERATOR=cpu

# What deepspeed.sh carries to the other hosts, as far as it is set: ssh gives a rank a fresh environment. PATH,
# because compilers and tools must be the same ones everywhere; the rest, because it is set here or by you.
# (SLURM carries the whole environment by itself.)
export ROFORMER_DIST_CARRY="PATH LD_LIBRARY_PATH PYTHONUNBUFFERED PYTHONFAULTHANDLER OMP_NUM_THREADS MALLOC_MMAP_THRESHOLD_ \
GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_DEBUG DS_ACCELERATOR ${ROFORMER_DIST_CARRY:-}"
