"""The data room: which rows a stage is trained on. Imports neither torch nor, before a file needs them, pyarrow."""

from alignkit.data.builtin import true_reward
from alignkit.data.load import read_rows, split_eval
from alignkit.data.report import DataReport, Problems, Rejects
from alignkit.data.rows import Message, Row, Text, escape_control_tokens, find_control_tokens
from alignkit.data.store import write_table

__all__ = ["DataReport", "Message", "Problems", "Rejects", "Row", "Text", "escape_control_tokens",
           "find_control_tokens", "read_rows", "split_eval", "true_reward", "write_table"]  # fmt: skip
