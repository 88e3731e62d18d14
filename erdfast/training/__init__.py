"""The trainer: one compiled step, what it records, and how it resumes."""
