"""The plain values in the middle, and what applies them: the seam (where features are taken), the plan (which channels
and blocks stay), cutting a copy by a plan, and putting a body under the teacher's head. Nothing here scores, traces or
trains.
"""
