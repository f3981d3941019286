"""The critic: a second model beside the policy that says how good each token, or a whole answer, is.

model, engine     the value model on any layout, its optimizer and schedules
scores, pairs     from per-token values to one score of an answer; a teacher's and a student's, side by side
discriminator     the ranking loss over pairs and everything reported of it
value             generalised advantages and the clipped value loss, for the critic of PPO
audit, details    the same numbers on a frozen set of pairs; a log to read the scores in
health            bands of its metrics, and what to do outside them
"""
