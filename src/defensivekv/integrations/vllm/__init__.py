"""vLLM: a plugin whose worker stores what a policy keeps, and whose scheduler counts it.

vLLM finds `register` by the entry point group `vllm.general_plugins`, in each of its processes. It has one hook, in the
making of the engine's configuration, which does nothing where `additional_config` has no "defensivekv". Where it has,
the configuration names our worker, and everything else follows from the worker's class:

    configure    the options and what cannot go with them; names the worker                    where the engine is made
    worker       says which layers' blocks are ours; gives each attention layer our backend    worker processes
    blocks       the cache specification and its manager: how many blocks a request takes      the scheduler's process
    step         what a step's requests read and write, once for all layers                    worker processes
    backend      each layer's part of it                                                       worker processes
    reading      prompts: attention over them, scores, what stays                              worker processes

Importing this package does not import vLLM.
"""

from defensivekv.integrations.vllm.hook import register
from defensivekv.integrations.vllm.versions import SUPPORTED_VERSIONS

__all__ = ["SUPPORTED_VERSIONS", "register"]
