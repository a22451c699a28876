"""Prompt learners: the vectors around class names are trained through a frozen text tower."""

from transclip_fast.heads.prompting import ContextSettings, Prompting, Schedule
from transclip_fast.heads.text_tower import TextTower

__all__ = ["ContextSettings", "Prompting", "Schedule", "TextTower"]
