"""Compressed documents kept in files: time to the first answer, bytes on the disk and in memory."""
