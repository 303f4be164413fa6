"""The ledger: every request, its state, its log and its webhook, in one database that survives any process."""

from server.ledger.ledger import Ledger
from server.ledger.states import (
    Blob,
    CancelAnswer,
    LogRow,
    NewLog,
    NewRequest,
    OutboxRow,
    Outcome,
    QueueRow,
    RequestRow,
    SlotRow,
    State,
)

__all__ = [
    "Blob",
    "CancelAnswer",
    "Ledger",
    "LogRow",
    "NewLog",
    "NewRequest",
    "Outcome",
    "OutboxRow",
    "QueueRow",
    "RequestRow",
    "SlotRow",
    "State",
]
