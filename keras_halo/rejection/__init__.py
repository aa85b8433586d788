from keras_halo.rejection.conformal_rule import ConformalRule
from keras_halo.rejection.coverage_rule import CoverageRule
from keras_halo.rejection.decision_files import read_decisions
from keras_halo.rejection.decision_log import DecisionLog
from keras_halo.rejection.decision_record import DecisionRecord
from keras_halo.rejection.decisions import Decisions
from keras_halo.rejection.false_positive_rate_rule import (
    FalsePositiveRateRule,
)
from keras_halo.rejection.groupwise_rule import GroupwiseRule
from keras_halo.rejection.joint_rule import JointRule
from keras_halo.rejection.label_set_rule import LabelSetRule
from keras_halo.rejection.label_sets import LabelSets
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.rejection.selective_risk_rule import SelectiveRiskRule
from keras_halo.rejection.storage import load_rule
from keras_halo.rejection.stream_monitor import (
    MonitorStatus,
    StreamMonitor,
    load_monitor,
    merged_status,
)

__all__ = [
    "ConformalRule",
    "CoverageRule",
    "DecisionLog",
    "DecisionRecord",
    "Decisions",
    "FalsePositiveRateRule",
    "GroupwiseRule",
    "JointRule",
    "LabelSetRule",
    "LabelSets",
    "MonitorStatus",
    "RejectionRule",
    "SelectiveRiskRule",
    "StreamMonitor",
    "load_monitor",
    "load_rule",
    "merged_status",
    "read_decisions",
]
