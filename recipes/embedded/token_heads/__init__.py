"""How the embedded heads on tokens were trained: patches of mini, and the prompt of mini-vlm."""
