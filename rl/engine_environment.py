"""What a process that hosts an engine has in its environment before it imports torch or vLLM."""

import os

from rl.config import EngineConfig


def engine_environment(config: EngineConfig, gpus: float = 0) -> dict[str, str]:
    """Variables for a process of its own; for this process, `set_engine_environment`."""
    common = {
        # The engine runs in the host's own process, where its thread can change weights between two steps.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # It warns of what we do on purpose, at every swap even: a tied head is not in the checkpoint.
        "VLLM_LOGGING_LEVEL": "ERROR",
        # What the engine's own parts say to each other stays on this machine.
        "VLLM_HOST_IP": "127.0.0.1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if gpus:
        return common
    return common | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(config.num_threads),
        # The little that vLLM compiles on a CPU takes longer to compile than it ever saves, and needs a C++ compiler.
        "TORCHDYNAMO_DISABLE": "1",
        # Threads that wait for each other by spinning take the cores of the other engines and of the trainer.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def set_engine_environment(config: EngineConfig, gpus: float = 0) -> None:
    """For this process, where nothing was set by whoever started it."""
    for name, value in engine_environment(config, gpus).items():
        os.environ.setdefault(name, value)
