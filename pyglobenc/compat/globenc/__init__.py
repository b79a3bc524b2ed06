"""The names and modules of the published GlobEnc repository (Modarressi et al., NAACL 2022)."""

from pyglobenc.compat.globenc.attention_flow_abstract import AttentionFlow
from pyglobenc.compat.globenc.attention_max_flow import AttentionMaxFlow
from pyglobenc.compat.globenc.attention_rollout import AttentionRollout
from pyglobenc.compat.globenc.metrics import compute_spearman_correlation, compute_spearman_correlation_hta
from pyglobenc.compat.globenc.model_attentions import build_ratio_residual_attentions, extract_attentions
from pyglobenc.compat.globenc.modeling import BertForSequenceClassification, ElectraForSequenceClassification
from pyglobenc.compat.globenc.task_loaders import TaskLoader

__all__ = [
    "AttentionFlow",
    "AttentionMaxFlow",
    "AttentionRollout",
    "BertForSequenceClassification",
    "ElectraForSequenceClassification",
    "TaskLoader",
    "build_ratio_residual_attentions",
    "compute_spearman_correlation",
    "compute_spearman_correlation_hta",
    "extract_attentions",
]
