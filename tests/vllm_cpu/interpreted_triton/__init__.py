"""
A backend of Triton for a machine without a GPU, installed by install_vllm_cpu.sh.

vLLM from 0.31 on returns routes and sampling masks from its second model runner, whose Triton kernels run as Python
under TRITON_INTERPRET=1. It uses Triton on a CPU only where a backend called `cpu` is there, which the wheels of
Triton lack. Goes when they bring one, or when vLLM has kernels of its own for a CPU.
"""
