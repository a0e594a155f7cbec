//! Clients that read and write what the history is about.

use std::sync::Arc;
use std::time::Duration;

use registry_api::{Error, Registry};

use super::{KEYS, Run};
use crate::history::{Answer, Demand, Write};
use crate::{Dice, key};

/// Reads and writes by chance until the end.
pub(super) async fn write(registry: Arc<dyn Registry>, run: Run, number: usize, mut dice: Dice) {
    let mut chapter = run.chapters.current();
    let mut client = chapter.client(&registry, number);
    while !run.is_over() {
        let current = run.chapters.current();
        if current.number > chapter.number {
            chapter = current;
            client = chapter.client(&registry, number);
        }
        let one = dice.pick(KEYS);
        let other = (one + 1 + dice.pick(KEYS - 1)) % KEYS;
        let answer = match dice.roll(12) {
            0..=3 => client.get(one).await,
            4 => client.list(&chapter.dir().into()).await,
            5 | 6 => client.commit(vec![], vec![(one, Write::Put)]).await,
            7 => client.commit(vec![], vec![(one, Write::Delete)]).await,
            8 | 9 => {
                let unchanged = client.unchanged(one);
                client.commit(vec![(one, unchanged)], vec![(one, Write::Put)]).await
            }
            10 => {
                let writes = vec![(one, Write::Put), (other, Write::Put)];
                client.commit(vec![(one, client.unchanged(one))], writes).await
            }
            _ => {
                let writes = vec![(one, Write::Delete), (other, Write::Put)];
                client.commit(vec![(one, Demand::Present)], writes).await
            }
        };
        // A store that is away is not to be asked without end.
        let pause = match answer {
            Answer::Nothing | Answer::Unknown => Duration::from_millis(50),
            _ => Duration::from_millis(10),
        };
        run.sleep(dice.time(pause)).await;
    }
}

/// Writes much, so that logs grow and are trimmed.
pub(super) async fn ballast(registry: Arc<dyn Registry>, run: Run) {
    let keys = [key("/ballast/1"), key("/ballast/2")];
    for number in 0_usize.. {
        if run.is_over() {
            return;
        }
        match registry.put(&keys[number % 2], vec![number as u8; 60_000]).await {
            Ok(_) | Err(Error::Unavailable { .. } | Error::OutcomeUnknown { .. }) => {}
            Err(error) => panic!("a put of a persistent key: {error:?}"),
        }
        run.sleep(Duration::from_millis(60)).await;
    }
}
