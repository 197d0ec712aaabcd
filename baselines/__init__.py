"""What the paper compares with (Sec. 4): SDEdit, Prompt-to-Prompt on real images, and Text2Live."""
