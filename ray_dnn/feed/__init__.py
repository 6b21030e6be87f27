"""Rows, from a dataset to the steps that use them.

A dataset is a sequence of *units*: a row group of a Parquet file, some small files, a thousand rows in memory. Each
unit is read and transformed by itself, so what comes out depends on the unit alone: neither on how many machines there
are nor on what Ray made of its blocks. `ray_dnn.sampler` says in which order an epoch uses units and rows. From there
on:

1. **Read.** Processes read units in the order of the epoch, a few at a time, and number the rows (`reading`). They are
   kept for the whole run and ask for no CPUs, so agents that hold all of them do not starve them (`hands`).
2. **Stream.** The driver lines the blocks up and counts their rows, without looking at them (`stream`).
3. **Deal.** As soon as the rows of some consecutive steps are there, they are taken into their order and dealt out, a
   table to each virtual worker (`dealing`): by such processes, or, if they are few, by the driver, which keeps some
   portions ahead of the steps (`feed`).
4. **Supply.** Agents hear of each portion, fetch the tables of the workers that they host, and cut batches from them
   without a copy (`supply`).

Nothing of this has state that a run depends on: which rows a step uses follows from its number. All that is known of
Ray Data's internals is in `raydata`.
"""
