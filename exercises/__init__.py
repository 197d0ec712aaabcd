"""The reader's turn: functions of the method to write oneself, judged by the project's own tests."""
