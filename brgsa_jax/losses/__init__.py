"""Objectives, and their diagnostics, as pure functions of arrays; the device axis is an argument.

Conventions of all of them: ``brgsa_jax.losses.common``. Nothing here sees parameters, modules or
configuration.
"""

from brgsa_jax.losses.classification import classification
from brgsa_jax.losses.contrastive import InfoNCE, info_nce, sigmoid
from brgsa_jax.losses.diagnostics import (
    BankHealth,
    BatchStatistics,
    bank_health,
    batch_statistics,
)
from brgsa_jax.losses.knowledge import (
    BankRead,
    KnowledgeInteraction,
    Reconstruction,
    knowledge_interaction,
    read_bank,
)
from brgsa_jax.losses.prototype import PrototypeAlignment, prototype_alignment, sinkhorn
from brgsa_jax.losses.tokenwise import (
    LocalAlignment,
    TokenAlignment,
    attention_weights,
    local_alignment,
    token_alignment,
)

__all__ = [
    "BankHealth",
    "BankRead",
    "BatchStatistics",
    "InfoNCE",
    "KnowledgeInteraction",
    "LocalAlignment",
    "PrototypeAlignment",
    "Reconstruction",
    "TokenAlignment",
    "attention_weights",
    "bank_health",
    "batch_statistics",
    "classification",
    "info_nce",
    "knowledge_interaction",
    "local_alignment",
    "prototype_alignment",
    "read_bank",
    "sigmoid",
    "sinkhorn",
    "token_alignment",
]
