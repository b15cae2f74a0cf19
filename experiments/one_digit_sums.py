"""Writes a small data set that a 135M model can learn from: every one-digit sum and difference, as questions.

    python experiments/one_digit_sums.py sums.jsonl
"""

import json
import sys

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
with open(sys.argv[1], "w") as file:
    for a in range(10):
        for b in range(10):
            file.write(json.dumps({"prompt": f"What is {a} + {b}? Answer with one number.", "answer": str(a + b)}) + "\n")
            if a >= b:
                file.write(json.dumps({"prompt": f"What is {a} - {b}? Answer with one number.", "answer": str(a - b)}) + "\n")
