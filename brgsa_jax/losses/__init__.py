"""Objectives as pure functions of arrays; the device axis is an argument.

Names, shapes and conventions: ``docs/objectives.md``. Nothing here sees parameters, modules or
configuration.
"""

from brgsa_jax.losses.contrastive import InfoNCE, info_nce, sigmoid
from brgsa_jax.losses.knowledge import (
    BankRead,
    KnowledgeInteraction,
    Reconstruction,
    knowledge_interaction,
    read_bank,
)

__all__ = [
    "BankRead",
    "InfoNCE",
    "KnowledgeInteraction",
    "Reconstruction",
    "info_nce",
    "knowledge_interaction",
    "read_bank",
    "sigmoid",
]
