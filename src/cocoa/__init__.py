"""CoCoA: turn a multimodal LLM into an embedding model (arXiv 2603.01471).

Reading order: `attention`, `corruption`, `reconstruction`, `stages.joint_reconstruction`, `pipeline`.
"""

__version__ = "0.1.0.dev0"
