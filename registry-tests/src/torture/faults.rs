//! What breaks, for how long, by chance.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use registry_api::Options;

use super::Run;
use crate::{Dice, Direction, Members, Net, Wire};

/// Breaks the connections of some of the clients, again and again; all are whole at the end.
pub(super) async fn break_wires(wires: &[Arc<Wire>], options: &Options, until: Instant, mut dice: Dice, run: &Run) {
    let ttl = options.session_ttl.get();
    while Instant::now() < until {
        for wire in wires {
            if dice.roll(2) == 0 {
                break_wire(wire, &mut dice, run);
            } else {
                wire.mend();
            }
        }
        sleep(dice.time(3 * ttl / 2), until).await;
        if dice.roll(2) == 0 {
            wires.iter().for_each(|wire| wire.mend());
            sleep(dice.time(ttl), until).await;
        }
    }
    wires.iter().for_each(|wire| wire.mend());
}

fn break_wire(wire: &Wire, dice: &mut Dice, run: &Run) {
    match dice.roll(5) {
        0 => {
            run.counts.one("wires cut");
            wire.cut();
        }
        1 => {
            run.counts.one("wires refused");
            wire.refuse();
        }
        2 => {
            run.counts.one("wires slowed");
            wire.slow(dice.time(Duration::from_millis(200)));
        }
        way => {
            run.counts.one("wires cut one way");
            wire.cut_one_way(if way == 3 {
                Direction::ToServer
            } else {
                Direction::ToClient
            });
        }
    }
}

/// Breaks members of the store, and their ways to each other, again and again; all run, and reach each other, at the end.
pub(super) async fn break_members(
    cluster: &impl Members,
    options: &Options,
    until: Instant,
    mut dice: Dice,
    run: &Run,
) {
    let ttl = options.session_ttl.get();
    while Instant::now() < until {
        // One of them, or all.
        let one = dice.pick(cluster.members());
        let members = match dice.roll(3) {
            0 => (0..cluster.members()).collect(),
            _ => vec![one],
        };
        match dice.roll(8) {
            0 | 1 => {
                run.counts.one("kills");
                join_all(members.iter().map(|&member| cluster.kill_member(member))).await;
                // A leader's death and return within the time of an election is a case of its own.
                let down = if dice.roll(2) == 0 { ttl / 10 } else { ttl };
                sleep(dice.time(down), until).await;
                join_all(members.iter().map(|&member| cluster.restart_member(member))).await;
            }
            2 | 3 => {
                run.counts.one("pauses");
                join_all(members.iter().map(|&member| cluster.pause_member(member))).await;
                sleep(dice.time(5 * ttl / 2), until).await;
                join_all(members.iter().map(|&member| cluster.resume_member(member))).await;
            }
            4 if cluster.trim().await => run.counts.one("trims"),
            5 if set_clocks(cluster, &members, &mut dice).await => run.counts.one("jumps of clocks"),
            _ => {
                if let Some(net) = cluster.net() {
                    break_net(net, one, cluster.members(), &mut dice, run);
                    sleep(dice.time(5 * ttl / 2), until).await;
                    net.mend();
                }
            }
        }
        sleep(dice.time(ttl / 2), until).await;
    }
}

/// Has more members come and go, beside whatever else breaks.
pub(super) async fn have_guests(cluster: &impl Members, options: &Options, until: Instant, mut dice: Dice, run: &Run) {
    while Instant::now() < until && cluster.have_a_guest().await {
        run.counts.one("members added and removed");
        sleep(dice.time(options.session_ttl.get()), until).await;
    }
}

/// Each goes wrong by up to a day, to either side; says whether there is a way.
async fn set_clocks(cluster: &impl Members, members: &[usize], dice: &mut Dice) -> bool {
    const DAY: i64 = 86_400;
    for &member in members {
        let ahead = dice.pick(2 * DAY as usize) as i64 - DAY;
        if !cluster.set_clock(member, ahead).await {
            return false;
        }
    }
    true
}

/// Breaks ways of one member to the others.
fn break_net(net: &Net, one: usize, members: usize, dice: &mut Dice, run: &Run) {
    let others: Vec<_> = (0..members).filter(|other| *other != one).collect();
    match dice.roll(5) {
        0 => {
            run.counts.one("members cut off");
            net.isolate(one);
        }
        1 => {
            run.counts.one("members cut off one way");
            others.iter().for_each(|&other| net.cut_one_way(one, other));
        }
        2 => {
            run.counts.one("members cut off one way");
            others.iter().for_each(|&other| net.cut_one_way(other, one));
        }
        3 => {
            // All others reach both sides.
            run.counts.one("bridges");
            net.cut(one, others[dice.pick(others.len())]);
        }
        _ => {
            run.counts.one("members slowed");
            let by = dice.time(Duration::from_millis(200));
            others.iter().for_each(|&other| net.slow(one, other, by));
        }
    }
}

/// Waits, but not beyond the end.
async fn sleep(time: Duration, until: Instant) {
    tokio::time::sleep_until((Instant::now() + time).min(until).into()).await;
}
