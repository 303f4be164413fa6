"""The ledger: every request, its state, its log and its webhook, in one database that survives any process."""

from server.ledger.ledger import Ledger
from server.ledger.states import (
    Backlog,
    Blob,
    CancelAnswer,
    LoadedModel,
    LogRow,
    Mode,
    NewLog,
    NewRequest,
    Order,
    OutboxRow,
    Outcome,
    QueueRow,
    RequestRow,
    SlotReport,
    SlotRow,
    State,
)

__all__ = [
    "Backlog",
    "Blob",
    "CancelAnswer",
    "Ledger",
    "LoadedModel",
    "LogRow",
    "Mode",
    "NewLog",
    "NewRequest",
    "Order",
    "Outcome",
    "OutboxRow",
    "QueueRow",
    "RequestRow",
    "SlotReport",
    "SlotRow",
    "State",
]
