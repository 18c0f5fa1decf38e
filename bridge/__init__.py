"""A plan on its way: plan.yaml -> reader -> Plan -> PlanWorkflow -> run_step activity -> Dispatch -> steps.<type>.run.

`reader` and `checks` find what is wrong with a plan before anything starts; `schedule` decides what may run next;
`workflow` (pure, replayed) drives it; `activities` attach to or start one attempt of a step; `client` starts,
watches, cancels and retries runs; `services` keeps the local Temporal server, worker and Ray alive; `jobs` makes a
command under a name a plan of one step.
"""
